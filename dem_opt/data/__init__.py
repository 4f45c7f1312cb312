"""Read data: files to rows, rows to documents, documents to tokens, tokens to windows.

`files`, `rows`, `documents` (with `messages` for conversations), `tokenize` (with `chat_template` and `byte_counts`),
`packing` and `windows` do one step each; `mixtures` blends training data. Imports checkpoints and the packages below
it; never merging or storage.
"""
