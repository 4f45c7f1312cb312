"""Score composites: from windows of tokens to nats per window.

`worker` merges and scores, `nll` runs the forward pass, `lm_head` turns hidden states into nats, `racing` stops
trials early. Imports merging, data, storage and the packages below them; never tracking or compute.
"""
