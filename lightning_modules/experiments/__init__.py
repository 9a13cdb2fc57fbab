"""Whole experiments: what a file says, the plan, its stages, the table and the report."""
