"""What is wanted: one file per experiment, each with a `config` (a `Train` record); its docstring says command, cost and result."""
