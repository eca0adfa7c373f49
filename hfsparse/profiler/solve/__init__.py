"""One choice a head under the budgets."""
