"""What a study found, to look at: figures, the offline report, Optuna Dashboard's plots, the launcher."""
