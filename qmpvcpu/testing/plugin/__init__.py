"""What the pytest plugin is made of; its door is :mod:`qmpvcpu.testing.pytest_plugin`.

Only :mod:`.async_fixtures` is imported before a test uses a fixture, and that only where there is pytest-asyncio.
"""
