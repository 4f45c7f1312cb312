"""Log a study in MLflow, off the critical path of the search.

`tracker` logs trials, `study_runs` writes the runs of a study, `job_runs` those of other work. The only package that
imports mlflow. Imports storage and the packages below it; never evaluation or compute.
"""
