"""Read data: files to rows, rows to documents, documents to tokens, tokens to windows.

`files`, `rows`, `documents` (with `messages` for conversations and `harness` for tasks), `tokenize` (with
`chat_template` and `byte_counts`), `packing` and `windows` do one step each; `mixtures` blends training data, `overlap`
compares documents. Imports checkpoints and the packages below it; never merging or storage.
"""
