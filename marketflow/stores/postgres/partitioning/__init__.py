"""Daily partitions of the minutes: the conversion of the table, and their upkeep."""
