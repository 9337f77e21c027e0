"""Policies by name. A new one is a folder and a line: the strings are resolved on use."""

# name -> "module:attribute" of the loader, called as load(folder, *, ...) (policies/base.py).
POLICIES = {"openvla_oft": "policies.openvla_oft.import_hf:load_policy"}
