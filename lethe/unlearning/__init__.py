"""One run of unlearning: check, prepare, train, record."""
