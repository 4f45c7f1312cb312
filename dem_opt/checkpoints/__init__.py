"""From checkpoint folders, hub ids and adapters to named tensors.

`files` reads headers and hashes, `architecture` knows models, `loading` reads parameters, `adapters` adds LoRA,
`locate` finds folders. Imports config and the root modules.
"""
