"""How good scores are: predictions of a split, metrics of every task, references, what blocks report, tables."""
