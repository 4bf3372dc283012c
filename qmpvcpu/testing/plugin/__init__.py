"""What the pytest plugin is made of; its door is :mod:`qmpvcpu.testing.pytest_plugin`.

Only :mod:`.stash` and one of the two modules of asynchronous fixtures are imported before a test uses a fixture.
"""
