"""Read data: files to documents, documents to tokens, tokens to windows.

`documents`, `tokenize` and `windows` do one step each; `mixtures` blends training data. Imports checkpoints and the
packages below it; never merging or storage.
"""
