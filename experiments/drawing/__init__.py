"""Pictures and pages of schedules and of measurements."""
