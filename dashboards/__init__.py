"""What people look at: reports and dashboards. Reads the store, the trial table and tracker exports only."""
