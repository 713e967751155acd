/* Writes to a ring buffer what the packet that it is run on says. */
BPF_RINGBUF_OUTPUT(records, 1);

#define MAX_WORDS 64

struct order {
	u32 count; /* of records */
	u32 words; /* of 4 bytes in each record, all with its number */
	u32 first; /* the first record's number */
	u32 discard; /* 1: the records are discarded */
	u32 padding[12];
};

struct record {
	u32 words[MAX_WORDS];
};

/* The number of records that had no place. */
int emit(struct __sk_buff *skb)
{
	struct order *order = (void *)(long)skb->data;
	struct record record;
	int lost = 0;
	u32 size;

	if ((void *)(order + 1) > (void *)(long)skb->data_end)
		return -1;
	size = (((order->words - 1) & (MAX_WORDS - 1)) + 1) * 4;
	for (u32 i = 0; i < 64 && i < order->count; i++) {
		if (order->discard) {
			void *place = records.ringbuf_reserve(4);

			if (place)
				records.ringbuf_discard(place, 0);
		} else {
			for (u32 word = 0; word < MAX_WORDS; word++)
				record.words[word] = order->first + i;
			if (records.ringbuf_output(&record, size, 0))
				lost++;
		}
	}
	return lost;
}
