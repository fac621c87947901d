"""Recipes: the schema, the loader, the planner (all pure but for reading files), and the YAML recipes themselves.

Enters: YAML text, the files it names, a host's toolchain, and a lookup of action records. Leaves: a
`Recipe`, its faults with `file:line`, and a `Plan`: every step with its key, its state and why.
No code of a recipe is ever run here. Imports `artifacts` and nothing else of Enginery.
Map: `schema` (Recipe v1), `loader` (YAML to Recipe: `yaml_text` and `nodes`, `includes`, `wording` of faults,
`rules` and `targets`), `files` (digests of what a recipe names: `bundle` and `imports` for code, `onnx_data`,
`digests`), `shapes` (profiles to tensor shapes), `planner`, `pipeline` (portable stages), `engine_stages`,
`publishing`, `steps` and `plan`, `gates` (does a precision pass).
"""
