"""One file per revision of the ledger's tables, oldest first. A released file is never changed: add the next one."""
