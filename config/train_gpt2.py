# GPT-2 small (124 million parameters) on OpenWebText, about 4 days on a node of 8 A100.
# nanoGPT reports a loss of about 2.85.
# python prepare.py --dataset=openwebtext
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
include('shared/owt.py')
out_dir = 'out/train_gpt2'
dataset = 'openwebtext'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
