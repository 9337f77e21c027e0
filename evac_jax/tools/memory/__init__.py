"""What a configuration needs of each device's memory."""
