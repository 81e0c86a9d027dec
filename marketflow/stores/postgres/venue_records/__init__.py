"""What PostgreSQL keeps of the records of venues beside the ticks."""
