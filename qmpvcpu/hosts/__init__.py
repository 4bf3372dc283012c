"""Floor 9: many hosts. The agent on each carries out what is wished of its VMs; campaigns change many of them.

- `policy`: what an agent does, and to which VMs.
- `hosted`: one VM as its agent knows it, and its document.
- `keeper`: carries out the wishes for one VM, each once.
- `requests`: what an agent is asked for, and what it answers.
- `outbox`: what happened to a host's VMs and who asked for what, on its way into the stream.
- `board`: the states of a host's VMs, for everybody to read.
- `agent`: `HostAgent`, which has all of these.
- `campaign`: what to do next for a campaign, a change of many VMs within bounds. Pure.
- `campaignbook`: `CampaignBook`: campaigns as every client sees and steers them.
- `controller`: `CampaignController`, which carries campaigns out.

Rule of this floor: nothing is sent to a QEMU for a wish before the wish says who sends it.
"""

from qmpvcpu.hosts.agent import HostAgent
from qmpvcpu.hosts.campaignbook import CampaignBook, CampaignSummary, vm_result
from qmpvcpu.hosts.controller import CampaignController
from qmpvcpu.hosts.policy import AgentPolicy

__all__ = ["AgentPolicy", "CampaignBook", "CampaignController", "CampaignSummary", "HostAgent", "vm_result"]
