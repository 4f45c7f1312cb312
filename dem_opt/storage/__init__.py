"""The SQL database of a study.

`engine` connects, `ledger` keeps every score once, `leases` keep drivers apart, `retry` waits out outages, `identity`
says what a study is about. The only package that imports sqlalchemy. Imports checkpoints and the packages below it;
never merging or data.
"""
