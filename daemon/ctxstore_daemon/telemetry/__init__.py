"""What the daemon tells its operator: log lines, metrics, health. It must not decide anything."""
