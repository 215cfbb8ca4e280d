"""Where a turn runs: placement, ownership, migration, failover, and the command line."""
