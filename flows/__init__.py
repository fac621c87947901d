"""The order of work, as Prefect flows: read top to bottom in a minute.

Enters: JSON parameters (a recipe's path, a store's address). Leaves: a JSON report. Imports `tasks`
and what is below it; entrypoints are module paths (`flows.build:build`).
"""
