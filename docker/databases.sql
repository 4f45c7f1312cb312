-- One server, two databases: Optuna (with the ledger beside it) and MLflow both claim a table `alembic_version`.
-- Each has a role of its own that sees nothing of the other.  psql reads the passwords from its environment.
\set ON_ERROR_STOP on
\getenv dem_opt_password DEM_OPT_PASSWORD
\getenv mlflow_password MLFLOW_PASSWORD
CREATE ROLE dem_opt LOGIN PASSWORD :'dem_opt_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE dem_opt OWNER dem_opt;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE dem_opt, mlflow FROM PUBLIC;
