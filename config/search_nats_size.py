# The size space of NATS-Bench on CIFAR-10 with the published settings of DrNAS; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_nats_size.py config/drnas.py
# On 4 GPUs:
# torchrun --standalone --nproc_per_node=4 train_search.py config/search_nats_size.py --gradient_accumulation_steps=4 --batch_size=16
# Of all 32,768 architectures the mean test accuracy after 90 epochs is 91.085% (NATS-Bench).
include('shared/cifar10.py')
include('shared/drnas_settings.py')
space = 'nats_size'
out_dir = 'out/search_nats_size'
affine = False
