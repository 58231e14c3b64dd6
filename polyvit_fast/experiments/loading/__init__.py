"""How a user's experiment file is run, and what is said when that fails."""
