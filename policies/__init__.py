"""Policies by name. A new one is a folder and a line: the strings are resolved on use."""

# name -> module with load_policy(folder, *, ...) and check_policy(folder, *, ...).
POLICIES = {"openvla_oft": "policies.openvla_oft.import_hf"}
