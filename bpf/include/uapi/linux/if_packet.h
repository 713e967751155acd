/* The kernel tree's name for a header of linux-libc-dev. No guard: include/uapi is itself on the
 * search path, so the first include_next may find this file once more. */
#include_next <linux/if_packet.h>
