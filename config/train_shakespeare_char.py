# nanoGPT's Shakespeare, by characters, on one GPU in some minutes; nanoGPT reports a validation
# loss of 1.4697.
# python prepare.py --dataset=shakespeare_char
# python train.py config/train_shakespeare_char.py
include('shared/shakespeare_char.py')
out_dir = 'out/train_shakespeare_char'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
