"""What happens to a study when the world is unkind: killed, full, read-only, damaged, planted."""
