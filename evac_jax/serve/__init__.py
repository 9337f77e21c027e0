"""Serves a policy to robots and evaluation scripts; started by `launch.py --mode=serve`."""
