"""What several tests share: files, models, servers and processes to test with."""
