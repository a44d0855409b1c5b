"""Which chunks of a job are done, shared by independent launches through one folder."""
