"""Every measured claim of the README, one command each, and the demo."""
