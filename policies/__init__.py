"""The table of policies. A new policy needs a folder and one line; strings are imported on use."""

# name -> module with load_policy(folder, *, ...) and check_policy(folder, *, ...).
POLICIES = {"openvla_oft": "policies.openvla_oft.import_hf"}
