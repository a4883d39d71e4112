"""The Kubernetes driver: watches TrainingRuns and runs their stages as JobSets."""
