"""Disks that are full, read-only, or go away under a keeper: real ones, a tmpfs each."""

from tests.record.conftest import RunInNamespace

FILL = 'head -c 1M /dev/zero > "$DISK/filler" 2>/dev/null || true'
TINY = 'mount -t tmpfs -o size=64k none "$DISK"; '


def test_a_disk_that_fills_up_costs_the_save_and_not_the_record(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        TINY + f"""printf '%s\\n' true '{FILL}' 'rm "$DISK/filler"' | $KEEP "$DISK/vm.xml";"""
        '$KEEP "$DISK/vm.xml" < /dev/null'
    )
    assert lines[:2] == ["open None", "saved"]
    assert lines[2].startswith("unchanged /")
    assert "No space left on device" in lines[2]
    assert lines[3:5] == ["saved", "['vm.xml']"]
    assert lines[5:] == ["open (3, True)", "['vm.xml']"]  # the save that failed has a generation too


def test_what_was_saved_before_the_disk_was_full_can_be_opened_on_the_full_disk(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        TINY + f'echo true | $KEEP "$DISK/vm.xml"; {FILL}; cksum < "$DISK/vm.xml";'
        'echo true | $KEEP "$DISK/vm.xml"; cksum < "$DISK/vm.xml";'
        'rm "$DISK/filler"; echo true | $KEEP "$DISK/vm.xml"'
    )
    assert lines[:3] == ["open None", "saved", "['vm.xml']"]
    assert lines[4] == "open (1, True)"
    assert "No space left on device" in lines[5]
    assert lines[6] == "['vm.xml']"
    assert lines[7] == lines[3]
    assert lines[8:] == ["open (1, True)", "saved", "['vm.xml']"]


def test_a_disk_without_room_for_the_lock_is_told_and_the_record_stays(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        'mount -t tmpfs -o nr_inodes=2 none "$DISK"; printf older > "$DISK/vm.xml"; $KEEP "$DISK/vm.xml" < /dev/null;'
        'cat "$DISK/vm.xml"'
    )
    assert "cannot be locked with .vm.xml.lock: No space left on device" in lines[0]
    assert lines[1:] == ["older"]


def test_a_folder_that_may_no_longer_be_written_to_costs_the_save_and_not_the_record(
    in_namespace: RunInNamespace,
) -> None:
    lines = in_namespace(
        TINY + """printf '%s\\n' true 'chmod 555 "$DISK"' 'chmod 755 "$DISK"' |"""
        'setpriv --bounding-set -dac_override $KEEP "$DISK/vm.xml"; $KEEP "$DISK/vm.xml" < /dev/null'
    )
    assert lines[:2] == ["open None", "saved"]
    assert lines[2].startswith("unchanged /")
    assert "Permission denied" in lines[2]
    assert lines[3:] == ["saved", "['vm.xml']", "open (3, True)", "['vm.xml']"]


def test_a_record_in_a_read_only_folder_cannot_be_kept_and_that_is_told(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        TINY + 'echo true | $KEEP "$DISK/vm.xml"; mount -o remount,ro "$DISK"; $KEEP "$DISK/vm.xml" < /dev/null;'
        'mount -o remount,rw "$DISK"; $KEEP "$DISK/vm.xml" < /dev/null'
    )
    assert "cannot be locked with .vm.xml.lock: Read-only file system" in lines[3]
    assert lines[4:] == ["open (1, True)", "['vm.xml']"]
