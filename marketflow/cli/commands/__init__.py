"""The commands of `marketflow`, one module each: its options, its help, and what it runs."""
