"""Official names and axis orders, one table for every network."""
