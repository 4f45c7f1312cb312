"""Figures, tables and pages of a study, notes in Optuna Dashboard, and the servers that show them.

`figures` draws a Summary as plotly figures by name, `tables` lists it as text, `html_report` renders both as one
offline page, `static_export` writes the figures as PNG and SVG, `optuna_dashboard` and `live_updates` keep Optuna
Dashboard up to date while a study runs, and `servers` starts Optuna Dashboard and MLflow on loopback. Imports
analysis, data, evaluation, tracking (addresses and MLflow's database file) and the root modules; never export or
training. Kept as a top-level folder of the repository and installed as `dem_opt.dashboards`.
"""
