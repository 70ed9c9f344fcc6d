"""Which sample comes when: orders without memory, and samples without end that are prepared as they are drawn."""
