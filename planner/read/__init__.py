"""What a person's configuration file says: each format in, with the line of every key."""
