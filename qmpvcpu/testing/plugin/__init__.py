"""What the pytest plugin is made of; its door is :mod:`qmpvcpu.testing.pytest_plugin`.

Nothing here is imported before a test uses a fixture.
"""
