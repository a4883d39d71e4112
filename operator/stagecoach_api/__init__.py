"""The contract between people, drivers and trainers: typed, torch-free, client-free."""
