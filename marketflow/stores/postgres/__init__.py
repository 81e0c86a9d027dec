"""The archive in PostgreSQL: connections, migrations, writer, readers, roll-ups, retention."""
