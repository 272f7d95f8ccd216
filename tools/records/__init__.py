"""Numbers and figures of README and docs, written from the committed records."""
