"""What the committed rows say, on one page: every comparison, wins and losses alike."""
