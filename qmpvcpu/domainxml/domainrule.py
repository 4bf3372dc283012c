"""libvirt's rules for the vCPUs of a domain, as words to branch on: ``DomainRuleError.rule`` and ``.stage``."""

import enum


class DomainRule(enum.Enum):
    """A rule of libvirt's; the value is the rule as a person reads it."""

    # The domain.
    NAME = "a domain has a name"
    NAME_UNUSABLE = "a domain's name has no / and no line break"
    UUID = "a UUID is 32 hexadecimal digits, with dashes between bytes"
    TYPE = "the type of a QEMU domain is kvm or qemu"
    # Values.
    ATTRIBUTE_MISSING = "this attribute is required"
    NOT_A_NUMBER = "the value is a whole number, 0 to 4294967295, without a blank after it"
    NOT_AN_INTEGER = "the value is a whole number, -2147483648 to 2147483647, without a blank after it"
    NOT_YES_OR_NO = "the value is yes or no, in small letters"
    NOT_A_CHOICE = "the value is one of the words that libvirt knows here"
    CPUSET_UNREADABLE = (
        "a cpuset is ids and ranges from 0 to 16383 with commas between them, and ^ before one to leave out"
    )
    CPUSET_EMPTY = "a cpuset has at least one CPU"
    # <memory>, and the memory of a cell.
    MEMORY_NOT_A_NUMBER = "memory is a whole number, without a blank after it"
    MEMORY_UNIT = "a unit of memory is bytes, or K, M, G, T, P or E, alone (1024) or with iB (1024) or B (1000)"
    MEMORY_TOO_LARGE = "memory is less than 2^53 KiB"
    # <vcpu>
    COUNT_NOT_A_NUMBER = "the number of vCPUs is a whole number, without blanks around it"
    COUNT_ZERO = "a VM has at least one vCPU"
    COUNT_NEGATIVE = "the number of vCPUs is not negative"
    COUNT_TOO_HIGH = (
        "no machine has more than 16384 vCPUs; libvirt allocates memory for each, and aborts if it cannot"
    )
    CURRENT_ABOVE_MAX = "at most the maximum number of vCPUs is enabled"
    # <vcpus>
    ID_ABOVE_MAX = "vCPU ids run from 0 to one below the number in <vcpu>"
    VCPU_0_OFF = "vCPU 0 is always enabled"
    VCPU_0_HOTPLUGGABLE = "vCPU 0 is not hotpluggable"
    VCPU_0_NOT_FIRST = "vCPU 0 is the first in the order"
    ORDER_INCOMPLETE = "either every enabled vCPU has an order, or none has"
    STARTED_WITH_AFTER_HOTPLUGGABLE = "the ids of vCPUs that QEMU starts with are below those of hotpluggable ones"
    STARTED_WITH_DESCENDING = "vCPUs that QEMU starts with are ordered by their ids"
    OFF_NOT_HOTPLUGGABLE = "a disabled vCPU is hotpluggable"
    ORDER_TWICE = "no two vCPUs (or slots of vCPUs) have the same order, enabled or not"
    ORDER_ABOVE_MAX = "an order is at most the maximum number of vCPUs"
    PART_OF_CORE = "on pseries the enabled vCPUs make up whole cores"
    CORE_DIFFERS = "on pseries the vCPUs of one core are alike"
    # <cputune>
    TUNE_NOT_A_NUMBER = "the value is a whole number"
    TUNE_OUT_OF_RANGE = "the value is 0, or in the kernel's range"
    PIN_WITHOUT_CPUSET = "a pin has a cpuset"
    PIN_TWICE = "a vCPU is pinned once"
    EMULATORPIN_TWICE = "there is one <emulatorpin> at most"
    SCHED_ABOVE_MAX = "a scheduler names only vCPUs below the maximum"
    SCHED_TWICE = "a vCPU has one scheduler"
    EMULATORSCHED_TWICE = "there is one <emulatorsched> at most"
    PRIORITY_OUT_OF_RANGE = "a real-time priority is 1 to 99"
    GROUPS_WITHOUT_KVM = "only a domain of the type kvm has <cachetune> and <memorytune>"
    GROUPS_OVERLAP = "a vCPU is in one <cachetune>, and a <memorytune> is for the same vCPUs or for others"
    # <cpu>
    MIGRATABLE_MODE = "only host-passthrough and maximum CPUs have migratable"
    FEATURE_WITHOUT_MODEL = "features require a named model"
    FEATURE_WITHOUT_NAME = "a feature has a name"
    FEATURE_TWICE = "a feature is named once"
    PASSTHROUGH_WITHOUT_KVM = "a host-passthrough CPU is for a domain of the type kvm"
    TOPOLOGY_ZERO = "a level of the topology has at least one member"
    TOPOLOGY_PRODUCT = "sockets, dies, clusters, cores and threads multiply to the maximum number of vCPUs"
    # <numa>
    NUMA_WITHOUT_CELLS = "<numa> has at least one <cell>"
    NUMA_ID_GAP = "the ids of cells run from 0 without a gap"
    NUMA_ID_TWICE = "no two cells have the same id"
    NUMA_OVERLAP = "a vCPU is in one cell"
    NUMA_TOO_MANY = "the cells have at most the maximum number of vCPUs"
    NUMA_ABOVE_MAX = "the cells name only vCPUs below the maximum"
    DISTANCES_WITHOUT_SIBLINGS = "<distances> has at least one <sibling>"
    DISTANCE_TO_NO_CELL = "a <sibling> is one of the cells"
    DISTANCE_OUT_OF_RANGE = "a cell's distance is 10 to itself, and 11 to 255 to another"
    # <numatune>
    NUMATUNE_TWICE = "there is one <numatune> at most"
    NODESET_MISSING = "memory that is not placed automatically has a nodeset"
    MEMNODE_WITHOUT_CELL = "a <memnode> is for a cell of <numa>"
    MEMNODE_TWICE = "a cell has one <memnode>"
    MEMNODE_AUTO = "memory that is placed automatically has no <memnode>"
    MEMNODE_RESTRICTIVE = "where <memory> is restrictive, each <memnode> is"
    # The machine.
    MACHINE_LIMIT = "a machine type has a maximum number of vCPUs"
    EIM_MISSING = "more than 255 vCPUs on x86 need a q35 machine with an <iommu> whose <driver> has eim='on'"


class RuleStage(enum.Enum):
    """When libvirt refuses what breaks a rule."""

    DEFINE = "define"
    START = "start"
