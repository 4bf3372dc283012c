"""The library's words about Python's calls and arguments, in those of the command line."""

from typing import Final

_WORDS: Final = (
    ("take_back(destination_is_gone=True)", "qmpvcpu take-back --destination-is-gone"),
    ("attach with config= and that path", "name it with --config"),
    ("attach(name=...)", "--name NAME"),
    ("attach(name=) names it", "--name NAME names it"),
    ("base= with this path makes it the record", "--record names a file of ours, or one that is not there yet"),
    ("attach with arrived=True once it has", "qmpvcpu confirm-target --record once it has"),
    ("attach without arrived=True", "qmpvcpu confirm-target is for one that has"),
    ("attach with arrived=True", "qmpvcpu confirm-target --record"),
    (
        "online=True has the agent bring it online, and so does vm.guest.set_online",
        "without --no-online the agent brings it online, and so does qmpvcpu guest online",
    ),
    ("attach(agent=ADDRESS) says", "--agent ADDRESS says"),
    ("attach(agent=...) takes", "--agent takes"),
    ("attach with agent= and the address of its socket", "name its socket with --agent ADDRESS"),
    ("attach with agent=", "name its socket with --agent ADDRESS"),
    ("with a longer boot=, or with its agent", "with a longer --boot, or with --agent"),
    ("fresh=True", "--fresh"),
    ("Proof.ONLINE", "--proof online"),
    ("offline_first=True", "--offline-first"),
    ("allow_fatal=True", "--allow-fatal"),
    ("allow_boot_vcpus=True", "--allow-boot-vcpus"),
    ("include_boot=True", "--include-boot"),
    ("use Proof.PRESENT", "leave --proof out"),
    ("set VmInfo.memory_kib", "name the VM's own document with --base"),
    ("x-exit-preconfig, and refresh(), first", "x-exit-preconfig first"),
    ("attach() takes a connected socket", "qmpvcpu takes no open descriptor: name the socket's path"),
    ("set_map is for", "qmpvcpu set is for"),
    ("base= is what", "--base is what"),
    ('placement="preferred"', "--placement preferred"),
)


def in_options(message: str) -> str:
    """Return *message* with commands and options instead of Python's calls and arguments."""
    for python, words in _WORDS:
        message = message.replace(python, words)
    return message
