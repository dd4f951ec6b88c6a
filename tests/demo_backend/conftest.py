pytest_plugins = ["rainfusion.testing.pytest_plugin"]
